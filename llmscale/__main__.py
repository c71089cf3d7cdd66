"""``python -m llmscale``."""

from llmscale.cli import main

if __name__ == "__main__":
    main()
