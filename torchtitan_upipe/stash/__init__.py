"""What waits between forward and backward: on the device, or in pinned host memory."""
