"""Images: from stored bytes to squares of uint8, as a viewer shows them; and contact sheets."""
