"""Times of the operation and of models, beside what they replace and what the device can do."""
