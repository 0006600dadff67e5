"""Methods that find a prompt for images."""
