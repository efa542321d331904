"""One HTML page that shows runs side by side, from what they wrote into their folders."""
