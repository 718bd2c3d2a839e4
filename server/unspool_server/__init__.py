"""The HTTP server: OpenAI's routes, keys, limits and streaming. It owns no tensor and asks the engine by messages."""
