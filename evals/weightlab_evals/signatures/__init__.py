"""The study of Robust Weight Signatures: what it trains, what it puts on, what comes out."""
