"""`odedit train`, and the trainings of a study."""
