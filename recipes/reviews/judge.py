"""A judge of reviews that no model here is trained on: the analyser of vaderSentiment."""


def sentiment(prompts: list[str], responses: list[str]) -> list[float]:
    """How positive each text is, from -1 to 1 (Hutto and Gilbert 2014)."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyser = SentimentIntensityAnalyzer()
    texts = (prompt + response for prompt, response in zip(prompts, responses, strict=True))
    return [float(analyser.polarity_scores(text)["compound"]) for text in texts]
