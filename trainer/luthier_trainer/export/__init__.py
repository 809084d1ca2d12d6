"""Tuned models in the form that others load: as an adapter, as one merged model, as GGUF; each proven to behave as the
model that was trained does."""
