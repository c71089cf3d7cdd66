"""llmscale: one recipe from raw text to an evaluated checkpoint, at any layout."""

__version__ = "0.1.0"
