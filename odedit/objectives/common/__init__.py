"""Parts that objectives share: the invariance penalty, its multiplier, and the measured bandwidth."""
