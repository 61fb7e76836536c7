"""The offline half: measuring speed and quality."""
