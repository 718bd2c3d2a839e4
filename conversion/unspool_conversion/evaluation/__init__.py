"""Measures a converted model beside its teacher and beside what it would be without its state."""
