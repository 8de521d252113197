"""The suites that come with clipjax, each a file with `suite() -> clipjax.config.Suite`. `clipjax eval suite` reads them."""
