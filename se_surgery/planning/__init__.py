"""Planning: where SEs go, as a frozen value. Nothing is changed."""
