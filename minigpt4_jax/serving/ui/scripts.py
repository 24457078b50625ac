"""JavaScript of the page: what the browser keeps when the page loads again, copies and downloads."""

_BOX = "document.querySelector('#question textarea')"

# Gradio loads the page again after a lost connection. The tab's sessionStorage outlives that: it tells that
# there was a conversation, and holds a question that was not sent, or sent and not answered.
REMEMBER_CONVERSATION = """() => {
    sessionStorage.setItem('minigpt4-conversation', '1');
    window.minigpt4Asked = '';
}"""
FORGET_CONVERSATION = "() => { sessionStorage.removeItem('minigpt4-conversation') }"
# the inputs of Handlers.ask
REMEMBER_QUESTION = """(conversation, token, box, ...others) => {
    window.minigpt4Asked = box?.text || '';
    return [conversation, token, box, ...others];
}"""
KEEP_QUESTION = f"""() => {{
    addEventListener('pagehide', () => sessionStorage.setItem(
        'minigpt4-question', {_BOX}?.value || window.minigpt4Asked || ''
    ));
}}"""
# the inputs of Handlers.load
REMEMBERED = """(_, box, conversation) => {
    const take = name => {
        const value = sessionStorage.getItem(name) || '';
        sessionStorage.removeItem(name);
        return value;
    };
    return [take('minigpt4-conversation'), {text: take('minigpt4-question'), files: []}, conversation];
}"""

# Gradio copies an answer as the HTML that shows it; this copies what the reader sees.
COPY_AS_SHOWN = """() => {
    document.querySelector('#chat').addEventListener('click', event => {
        const button = event.target.closest('button[aria-label="Copy message"]');
        const row = button?.closest('.message-buttons').previousElementSibling;
        const shown = row?.querySelector('[data-testid=bot], [data-testid=user]');
        if (!shown) return;
        setTimeout(() => navigator.clipboard?.writeText(shown.innerText.trim()), 50);
    });
}"""
DOWNLOAD = "() => { setTimeout(() => document.querySelector('#download').click(), 100) }"
