"""A pod's link: made, compared and removed. In: an attachment; out: kernel state."""
