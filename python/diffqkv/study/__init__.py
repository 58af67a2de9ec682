"""The efficiency study of section 3.3: what a shape costs by length of its text, measured, modelled and drawn.

Data flows one way: `systems` names what is compared, `measure` takes samples of it into a folder (`samples`), `results`
makes numbers of them with the cost model (`costs`), `figures` and `report` show these. `advise` answers from the cost
model alone.
"""
