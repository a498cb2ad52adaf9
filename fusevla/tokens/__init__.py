"""Text to tokens and back: the tokenizer, and the protocol that joins prompt, thought and decision."""
