"""What a model's layers see at work: its own text, and the second moments of every linear layer's input."""
