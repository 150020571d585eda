"""What the five scripts share and none of the four papers claims."""
