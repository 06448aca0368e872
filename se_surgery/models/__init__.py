"""Models: bases by name, recipes, and this library's names in timm's registry."""
