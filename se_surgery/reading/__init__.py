"""Reading: what a network does, learnt from one forward on the meta device: its calls, and its blocks as graphs."""
