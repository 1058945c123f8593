"""Context-parallel attention methods; see ``strategy.py`` for what they share."""
