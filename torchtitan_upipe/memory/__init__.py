"""What is kept between forward and backward, on the device (``stash.py``) and in host memory (``offload.py``)."""
