"""SigLIP, dual-expert Gemma and LoRA as plain-pytree Equinox modules, and openpi's checkpoint layout."""
