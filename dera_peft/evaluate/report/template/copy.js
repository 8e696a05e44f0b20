// A text goes to the clipboard; where there is none, it is selected.

const copyText = (text, button, otherwise) => {
  const before = button.textContent;
  const say = (word) => {
    button.textContent = word;
    setTimeout(() => (button.textContent = before), 1500);
  };
  if (!navigator.clipboard) return otherwise(say);
  navigator.clipboard.writeText(text).then(() => say("Copied"), () => otherwise(say));
};

for (const button of document.querySelectorAll(".copy")) {
  const command = document.getElementById(button.dataset.of);
  button.addEventListener("click", () =>
    copyText(command.textContent, button, (say) => {
      getSelection().selectAllChildren(command);
      say("Selected");
    }),
  );
}
