"""What is kept between forward and backward; see ``stash.py``."""
