"""The SE itself: its module, its lean form, and what it costs."""
