"""What people expect around a file: its name, a model card, a Modelfile for Ollama."""
