"""The verification tab: a picture as the query, the signed statement of its origin as the result."""

import gradio as gr

from jobs.explore.api_models import VerifyRequest
from jobs.explore.explorer import Progress
from jobs.explore.tabs import views
from jobs.explore.tabs.widgets import EVENT_OPTIONS, PageContext, Tab, file_as_base64, page_event, upload_field


def add_tab(context: PageContext) -> Tab:
    """Add the form and its events to the page."""
    image = upload_field("PNG or JPEG picture")
    output = gr.HTML(elem_id="verification", min_height=40)

    async def verify(progress: Progress, path: str | None) -> str:
        if path is None:
            return ""
        return views.verification(await context.explorer.verify(VerifyRequest(image=file_as_base64(path))))

    answer = page_event(context, verify)
    image.upload(answer, [image], output, **EVENT_OPTIONS)
    return Tab("verify", [image], answer, output, lambda query: [None])
