"""Are fine-tuned models better? Their pictures, scores and tables, and what people say of them."""
