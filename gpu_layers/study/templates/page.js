"use strict";
(() => {
  const buttons = document.querySelectorAll("button[data-language]");
  const show = (language) => {
    const chinese = language === "zh";
    document.documentElement.classList.toggle("chinese", chinese);
    document.documentElement.lang = chinese ? "zh-CN" : "en";
    for (const button of buttons) {
      button.setAttribute("aria-pressed", String(button.dataset.language === language));
    }
  };
  for (const button of buttons) {
    button.addEventListener("click", () => show(button.dataset.language));
  }
  show((navigator.language || "en").toLowerCase().startsWith("zh") ? "zh" : "en");
})();
