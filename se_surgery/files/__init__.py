"""Files: operated models as safetensors with their recipe, in folders and on the Hugging Face Hub."""
