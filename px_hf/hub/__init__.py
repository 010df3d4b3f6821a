"""Save, load, publish: folders and repositories that stock transformers and timm load."""
