"""Gates: what SEs do on data, and what each of them is worth."""
