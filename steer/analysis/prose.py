"""A paragraph of our own to measure on where nobody gives a text and the model writes none."""

PARAGRAPH = """\
The harbour was quiet when Ada opened the door of the workshop. Rain had fallen all night, and the boards of the pier
were still dark with it. She lit the lamp, put the kettle on the stove and looked at the letter again. It asked for
three things: a boat that two people could row, a price, and an answer before Friday. "That is not much time," said her
brother, who had come in behind her with an armful of oak. "It is enough," she answered. In 1931 their grandfather had
built such a boat in nine days, with 40 copper nails to the plank and no drawing but the one in his head. She still had
his notebook. On its last page he had written what every builder learns sooner or later: measure the water, not the
wood. She turned up her sleeves, sharpened the plane and began with the keel, while the gulls argued on the roof and the
first ferry of the morning blew its horn across the bay.
"""
"""About 200 tokens of plain prose."""
