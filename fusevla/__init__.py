"""Fine-tune the pi0.5 vision-language-action model so that it reasons in text and acts with one set of weights."""

__version__ = "0.1.0"
