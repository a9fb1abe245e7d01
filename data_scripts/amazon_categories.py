"""The categories of the Amazon reviews as the files of the publisher name them, and what hashes are known."""

from __future__ import annotations

from collections.abc import Mapping

# of the ratings-only files, as recorded by OmniRec's data loaders from mcauleylab.ucsd.edu
RATINGS_2018_SHA256: Mapping[str, str] = {
    "AMAZON_FASHION": "c72e84207601cd00840a91b9b4433c60b8be800a27aa86991f5cb57f29b99825",
    "All_Beauty": "b3d9260771f9fe489a61180b9ff407e15e10f481a287848f69bc4709b669246f",
    "Appliances": "35af90b093508f4a811d259b71b94d45b2f67b0daf3d702203d29ff6b16b1e28",
    "Arts_Crafts_and_Sewing": "ab42ec44840c130b8bcb1993bad37021b5ff98f3aae55a120c2a0d0624be3be5",
    "Automotive": "3cb4182e6623f1ac4511cf02a46c5ba11b761fa6d7feead7922199603f9d35df",
    "Books": "2ff13d9763d38118851d8f8a4ab530f958e08ad48aa764c2d9bbe16ec227a3b8",
    "CDs_and_Vinyl": "daedcfb79310479728f11cc1e66d49ec6dccdec124222391bf6f4f69ca5092db",
    "Cell_Phones_and_Accessories": "c05835e7a7f7a1b0bab4fe4f2dbabecb102fde22de579758d10d36973d8b6a14",
    "Clothing_Shoes_and_Jewelry": "8b78d8a965e2351468deeebe99edb6118561711be4d5b6294e24e25f910c4d3d",
    "Digital_Music": "a73f1504ed58fdc3533a6817b4c89fc4f722eb46dc18f94a4566a4b171439c9c",
    "Electronics": "1ce756643c0abed1b0d8a0738e67fc2510f3086d2bd52567942e18582dd01791",
    "Gift_Cards": "e360486b46b7eef5f2ed3ecc0a486f15097b7600fbee4079632418496802704a",
    "Grocery_and_Gourmet_Food": "9652d130382a3f1fcbfffffcaf3b8474e2649be034fbea8b0281b78424b65d40",
    "Home_and_Kitchen": "618e6c4493bcdd147a2bf3015bc0835dfedbc03570fba7d89335d9cd360069eb",
    "Industrial_and_Scientific": "29e194947309c1a0e81f0f9646fd6f63959949dbd807ea327e07074f35376a30",
    "Kindle_Store": "f2fac32f72f51857f164c2c1671db141f06b2649608ebf1af2efba02a2fb219b",
    "Luxury_Beauty": "5e1ab08a0147412d6a15ab4b8259df7fbc1fe09c747ba5c46486081ee4d68d24",
    "Magazine_Subscriptions": "40287d71ee0c49030ee222888fb21a95941c2c31344e15bdd2e58e0f63831c2d",
    "Movies_and_TV": "c7a6ca7769a34fd0d335e1cd25e359c18a8fcd474515f8b62986297e35b5fc4f",
    "Musical_Instruments": "8933b17434e4984bcce8cf4ec43d847e0af6aa6d46add28bbb37b80e06da1b06",
    "Office_Products": "2e24f3df092efc71fa4dea41162c7c1ab2d46bc53c4cace63794a3a66dc6d82f",
    "Patio_Lawn_and_Garden": "103438afc6ddb6a9416b94804bf86251b7d3b15bdf6cc50e90d6787008f08e31",
    "Pet_Supplies": "dac12cc077131bdf1c951cc0cc2016d6381e6b52eb65a3cb98456ce82a3c6bd9",
    "Prime_Pantry": "ed55b1f239c4ec3402fdd15a603a4b84210177678c36c01db59487a8fddf685c",
    "Software": "86d2ec7712b4c979bf7e7e984d39989b610c9f0e4ba4fc02c6aac7dcd9a15583",
    "Sports_and_Outdoors": "da8d746f1602d5ff01d4056c8f55b228996a30d40069b658d71388b0bf3df5d6",
    "Tools_and_Home_Improvement": "1406d988afa38c62aeba1e6b33dada18a570fa6d8dd59cbc6e5229f8ecae0db0",
    "Toys_and_Games": "cfdf96d55b3d923c913f3b139e7fabdc20360989db38527ef5947982aa246d45",
    "Video_Games": "c3fec1cce4ee67f0d51f8b53a7e294d8bbe6f75ca1d8732256e900b3c46606d8",
}

CATEGORIES: Mapping[int, tuple[str, ...]] = {
    2014: (
        "Amazon_Instant_Video",
        "Apps_for_Android",
        "Automotive",
        "Baby",
        "Beauty",
        "Books",
        "CDs_and_Vinyl",
        "Cell_Phones_and_Accessories",
        "Clothing_Shoes_and_Jewelry",
        "Digital_Music",
        "Electronics",
        "Grocery_and_Gourmet_Food",
        "Health_and_Personal_Care",
        "Home_and_Kitchen",
        "Kindle_Store",
        "Movies_and_TV",
        "Musical_Instruments",
        "Office_Products",
        "Patio_Lawn_and_Garden",
        "Pet_Supplies",
        "Sports_and_Outdoors",
        "Tools_and_Home_Improvement",
        "Toys_and_Games",
        "Video_Games",
    ),
    2018: tuple(RATINGS_2018_SHA256),
}
