"""From weights to behaviour: prefill, reason, act."""
