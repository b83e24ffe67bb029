"""llama.cpp as the engine: building the patched library, finding it, opening models in it."""
