"""What the server process of ``ranks.py`` imports before it forks ranks. No tensor work may happen here."""

from torchtitan_upipe import train  # noqa: F401
