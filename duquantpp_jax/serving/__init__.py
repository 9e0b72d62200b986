"""A model behind OpenAI's HTTP interface: requests, the queue of texts, the ASGI application."""
