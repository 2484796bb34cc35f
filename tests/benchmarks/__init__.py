"""What an edit costs: ratios measured side by side in one run, as tables, JSON and plots. Not collected as tests."""
