"""The engine over HTTP: OpenAI's API, metrics, a page that shows what memory does. Needs the extra ``serve``."""
