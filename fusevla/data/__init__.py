"""From a LeRobot folder and its reasoning annotations to batches. NumPy only; ``augment`` is the one device-side module."""
