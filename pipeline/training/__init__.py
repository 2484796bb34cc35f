"""Trainings of editors' weights: `odedit train`, and the trainings of a study."""
