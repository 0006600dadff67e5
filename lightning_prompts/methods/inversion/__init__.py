"""Methods that find the prompt of given images."""
