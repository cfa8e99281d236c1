"""The engine over HTTP: OpenAI's API, metrics, and a page that shows what memory is doing. Needs the extra ``serve``."""
