"""Parts that objectives share: terms, the invariance penalty, its multiplier and dual step, the measured bandwidth."""
