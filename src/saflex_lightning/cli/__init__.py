"""The commands ``saflex-train``, ``saflex``, ``saflex-report`` and ``saflex-generate``."""
