"""Parts that objectives share: terms, the invariance penalty, its multiplier, and the measured bandwidth."""
