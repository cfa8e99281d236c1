"""What a checkpoint is: the trunk that transformers loads, and where the experts' bytes lie."""
