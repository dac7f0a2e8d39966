"""A real model beside its peers. Run bench/real_model.py.

An engine holds one model in one file and has two calls, which take token ids and choose the likeliest token:
    prompt(tokens): runs one prompt from nothing. Gives (seconds, [the token that follows]).
    start(prompts): runs prompts of their own sequences. Gives the token that follows each.
    advance(steps): goes on by so many steps of one token each. Gives (seconds, the new tokens of each sequence).
        Nothing ends a sequence.
"""
